"""The MindFormers load-checkpoint hook and how it gets installed."""
