"""An OpenAI-compatible server for one model.

``forms`` checks every field of a body, ``engine`` is the one thread that computes,
``answers`` words replies as clients expect them, ``app`` is the HTTP side with its limits,
``serving`` starts and stops it all.
"""

from mlxquant.server.forms import BODY_LIMIT as BODY_LIMIT
from mlxquant.server.forms import Options as Options
from mlxquant.server.serving import serve as serve
