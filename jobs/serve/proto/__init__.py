"""The gRPC interface: ``shoal/v1/inference.proto``, and what is generated from it (``make proto``)."""
