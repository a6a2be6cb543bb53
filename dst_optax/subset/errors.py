"""The one error of subset files and operations."""


class SubsetError(ValueError):
    """A subset, its file or the model it is meant for is not as it must be; nothing was changed."""
