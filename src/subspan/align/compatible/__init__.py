"""Train encoders whose vectors stay comparable with those that exist."""
