"""The gate of an adapter: where and how it opens, its keys, and its file."""
