"""What happened at each denoising step: written to a file, read again, and shown on a page."""

from diffusion_runtime.tracing.file import Trace, TraceStep, read, write
from diffusion_runtime.tracing.page import page

__all__ = ["Trace", "TraceStep", "page", "read", "write"]
