"""What a model is tuned on."""
