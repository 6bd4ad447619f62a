"""The objectives, and the methods that have state."""
