"""What a rank reads: packed batches streamed from tokenised Parquet."""
