"""Answers questions about audio files and streams with an exported model."""
