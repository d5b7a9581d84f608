"""Long work in the background: raw fine-tunes become experts."""
