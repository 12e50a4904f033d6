"""Images and plots, written as PNG files."""
