"""What the server can do, without HTTP."""
