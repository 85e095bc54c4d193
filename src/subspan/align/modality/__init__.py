"""Close the gap between the vectors of two modalities."""
