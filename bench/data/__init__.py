"""Images and labels: read, fingerprinted, augmented."""
