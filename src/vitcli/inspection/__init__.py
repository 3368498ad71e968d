"""`vit inspect`: what is inside a model, as ViT (2010.11929) shows in its figures 6, 7, 10, 11, 13 and 14, and beyond.

Numbers are pure functions of weights and activations: `embeddings`, `attention`, `similarity`, `tokens`, `fields`. `survey` and
`views` show images to a model and gather them; `charts` and `overlays` draw; `gallery` says what each figure shows.
"""

from vitcli.inspection.command import Asked, inspect

__all__ = ["Asked", "inspect"]
