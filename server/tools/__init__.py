"""Tools: what a model may call, how it says so in text, and how that becomes calls again. Knows no HTTP."""
