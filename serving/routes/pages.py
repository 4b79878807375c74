"""The page, and the browsable API; every byte comes from this server."""

from pathlib import Path

from fastapi import APIRouter
from fastapi.responses import FileResponse
from starlette.staticfiles import StaticFiles

__all__ = ["router", "static_mounts"]

router = APIRouter(include_in_schema=False)
_WEB = Path(__file__).parent.parent / "web"


@router.api_route("/", methods=["GET", "HEAD"])
async def page() -> FileResponse:
    return FileResponse(_WEB / "index.html")


@router.api_route("/docs", methods=["GET", "HEAD"])
async def docs() -> FileResponse:
    return FileResponse(_WEB / "docs.html")


def static_mounts() -> dict[str, StaticFiles]:
    """Path to folder of files that need no code."""
    return {"/web": StaticFiles(directory=_WEB)}
