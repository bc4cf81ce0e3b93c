"""The inference engine of one rank: token ids in, token ids out. Text, HTTP and gRPC are `shoal.jobs.serve`'s."""
