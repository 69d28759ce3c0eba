"""What runs in the sandboxed processes; it imports the standard library and itself only."""
