"""What we use of KServe. Its server reads the command line of whatever imports it; here it sees none."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def no_arguments() -> Iterator[None]:
    """Hide the options of our command line, also from the processes that are started meanwhile."""
    mine = sys.argv
    sys.argv = mine[:1]
    try:
        yield
    finally:
        sys.argv = mine


with no_arguments():
    from kserve import InferInput as InferInput
    from kserve import InferOutput as InferOutput
    from kserve import InferRequest as InferRequest
    from kserve import InferResponse as InferResponse
    from kserve import Model as Model
    from kserve import ModelServer as ModelServer
    from kserve.errors import InvalidInput as InvalidInput
    from kserve.errors import ModelNotFound as ModelNotFound
    from kserve.errors import ModelNotReady as ModelNotReady
    from kserve.metrics import PREDICT_HIST_TIME as PREDICT_HIST_TIME
    from kserve.protocol.dataplane import DataPlane as DataPlane
    from kserve.protocol.grpc import grpc_predict_v2_pb2 as pb
    from kserve.protocol.grpc.grpc_predict_v2_pb2_grpc import (
        add_GRPCInferenceServiceServicer_to_server as add_servicer,
    )
    from kserve.protocol.grpc.server import GRPCServer as GRPCServer
    from kserve.protocol.grpc.servicer import InferenceServicer as InferenceServicer
    from kserve.protocol.infer_type import RequestedOutput as RequestedOutput
    from kserve.protocol.model_repository_extension import ModelRepositoryExtension as ModelRepositoryExtension
    from kserve.protocol.rest.multiprocess.server import RESTServerMultiProcess as RESTServerMultiProcess
    from kserve.protocol.rest.multiprocess.server import RESTServerProcess as RESTServerProcess
    from kserve.protocol.rest.server import RESTServer as RESTServer
    from kserve.protocol.rest.v2_endpoints import V2Endpoints as V2Endpoints

__all__ = ["add_servicer", "pb"]
