"""Fine-tuning: rows of a data set, rendered and packed, through one loop into an adapter or a model."""
