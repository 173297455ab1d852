"""Per-sample gradients as structured N × p matrices, samples in rows."""

from .base import GradientMatrix as GradientMatrix
from .base import concatenate as concatenate
from .dense import DenseGradients as DenseGradients
from .embedding import EmbeddingGradients as EmbeddingGradients
from .outer_product import OuterProductGradients as OuterProductGradients
from .stacked import StackedGradients as StackedGradients
from .streamed import StreamedGradients as StreamedGradients
from .transposed import Transposed as Transposed
