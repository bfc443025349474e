"""Whatever goes wrong, as a refusal that says what the client may know."""

import logging

from starlette.exceptions import HTTPException

from queryfoil.deploy.kserving import InvalidInput, ModelNotFound, ModelNotReady
from queryfoil.deploy.model import InvalidError
from queryfoil.deploy.tensors import RefusedError

log = logging.getLogger(__name__)


def as_refusal(error: Exception) -> RefusedError:
    """The refusal that an exception comes to; one that nobody has foreseen is logged, without its text."""
    if isinstance(error, RefusedError):
        return error
    if isinstance(error, InvalidError):
        return error.refusal
    if isinstance(error, InvalidInput):
        return RefusedError("format", error.reason)
    if isinstance(error, ModelNotFound):
        return RefusedError("route", "no such model; /v2/models has the names")
    if isinstance(error, ModelNotReady):
        return RefusedError("busy", "the model is not ready")
    if isinstance(error, HTTPException) and error.status_code == 404:
        return RefusedError("route", "no such path; the service has the paths of the Open Inference Protocol, /v2/...")
    if isinstance(error, HTTPException) and error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "another method")
        return RefusedError("method", f"expected {allowed} for this path")
    log.error("internal error: %s at %s", type(error).__name__, _where(error))
    return RefusedError("internal", "internal error")


def _where(error: BaseException) -> str:
    """The place in the code where an error came from; its text could hold what a client sent."""
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    return "?" if last is None else f"{last.tb_frame.f_code.co_filename}:{last.tb_lineno}"
