"""Doors for callers who speak another library's words. They translate, and compute nothing."""
