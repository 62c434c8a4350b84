"""Many runs: compared, swept, studied."""
