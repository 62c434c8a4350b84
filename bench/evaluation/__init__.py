"""How right and how robust a trained network is."""
