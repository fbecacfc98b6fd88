"""The gate of a LoRA adapter: a rule that lets the adapter act only on some inputs."""
