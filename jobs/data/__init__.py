"""Text in, tokenised Parquet out."""
