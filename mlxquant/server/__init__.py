"""An OpenAI-compatible server for one model."""

from mlxquant.server.forms import BODY_LIMIT as BODY_LIMIT
from mlxquant.server.forms import Options as Options
from mlxquant.server.serving import serve as serve
