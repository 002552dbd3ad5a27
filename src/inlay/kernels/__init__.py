"""Fast paths, each tested against a naive twin that computes the same. Importing this package switches them on;
`inlay.fast_paths(False)` runs the twins instead. Their order is in `core/forward/wrappers.py`."""

from inlay.core.forward.wrappers import register, register_around_root
from inlay.kernels import dropout, flash, gated, labelled_loss, norm, packed, read_positions, trunk

register("dropout", dropout.dropout, dropout.is_dropout)
register("attention-backward", flash.attention, flash.is_attention)
register("gated-mlp", gated.gated, gated.is_gated)
register("loss-at-labels", labelled_loss.head, labelled_loss.is_head)
register("norm", norm.norm, norm.is_norm)
register("trunk-cache", trunk.trunk)
register("read-positions", read_positions.candidate, read_positions.is_candidate)
register_around_root("packing", packed.around)
register_around_root("loss-at-labels", labelled_loss.labelled)
register_around_root("read-positions", read_positions.around)
