"""Time: of a step, of training, of a GPU that is or is not here."""
