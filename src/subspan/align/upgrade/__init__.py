"""Change the encoder of an index without encoding it again."""
