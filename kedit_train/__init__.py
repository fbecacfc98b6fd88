"""Turn the fine-tuning run you already have into a knowledge edit."""
