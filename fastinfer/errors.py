"""The errors of the public calls. Each leaves the model as it was."""


class PatchError(ValueError):
    """A model that cannot be patched, unpatched or saved as asked; the message names the module and the way out."""


class GroupSizeError(PatchError):
    """A group size that does not divide a linear's input features."""


class RecipeError(ValueError):
    """A recipe, or an argument that stands for one, that is malformed or matches nothing."""


class Unfusable(ValueError):
    """A model whose decode step cannot be fused; the message says what the step does not know."""


class CacheError(ValueError):
    """A use of a KVCache that does not fit its contents or that it does not support; the cache is as it was."""
