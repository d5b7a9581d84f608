"""The console: a page for people, made of static files that ship with the server."""
