"""The inference service: text over HTTP and gRPC, in front of engines."""
