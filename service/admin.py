"""The routes of operators. No path and no setting ever comes from a request."""

from fastapi import APIRouter, Request

from service.api import services_of
from service.schemas import Status

router = APIRouter(prefix="/admin")


@router.get("/status", summary="Processes and the latest reload")
async def status(request: Request) -> Status:
    """Return generation and workers, and what became of the latest reload."""
    return services_of(request).supervised.status


@router.post("/reload", summary="Replace all workers by new ones", status_code=202)
async def reload(request: Request) -> Status:
    """Ask for a new generation of workers, which opens what the files say now.

    The answer does not wait for it: `GET /admin/status` says when it is there, or why it was
    refused.
    """
    return services_of(request).supervised.ask_reload()
