"""Read the adapter of a checkpoint: merged into its base model, or as a folder of PEFT."""
