"""Layer types whose weights inlay can read and write. Importing this package registers all of them."""

from inlay.bases import dense

__all__ = ["dense"]
