"""A small gRPC client: ``python -m shoal.jobs.serve.ask HOST:PORT "a text to go on from"``."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

import grpc

from shoal.jobs.serve.proto.shoal.v1 import inference_pb2 as pb
from shoal.jobs.serve.proto.shoal.v1 import inference_pb2_grpc


def open_channel(address: str, authority: Path | None = None) -> Any:
    """A channel to ``host:port``; with TLS if ``authority``, a PEM file, says whom to trust."""
    if authority is None:
        return grpc.insecure_channel(address)
    return grpc.secure_channel(address, grpc.ssl_channel_credentials(authority.read_bytes()))


def main() -> int:
    """Prints the answer as it comes; returns 1 with the status on standard error when there is none."""
    parser = argparse.ArgumentParser(prog="python -m shoal.jobs.serve.ask", description=__doc__)
    parser.add_argument("address", metavar="HOST:PORT")
    parser.add_argument("text")
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--tls-ca", type=Path, metavar="FILE", help="PEM file that vouches for the service")
    asked = parser.parse_args()
    token = os.environ.get("SHOAL_API_TOKEN")
    sampling = pb.Sampling(max_tokens=asked.max_tokens, temperature=asked.temperature)
    if asked.tls_ca and not asked.tls_ca.is_file():
        print(f"--tls-ca {asked.tls_ca} does not exist: name a PEM file", file=sys.stderr)
        return 3
    with open_channel(asked.address, asked.tls_ca) as channel:
        responses = inference_pb2_grpc.InferenceStub(channel).Generate(
            pb.GenerateRequest(text=asked.text, sampling=sampling),
            metadata=(("authorization", f"Bearer {token}"),) if token else (),
        )
        try:
            for response in responses:
                print(response.text, end="", flush=True)
            print()
        except grpc.RpcError as error:
            print(f"{error.code().name}: {error.details()}", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
