"""What a model predicts on a text, alone and beside the model that it was made from."""

from lightning_modules.evaluation.scores import Scores as Scores
from lightning_modules.evaluation.scores import evaluate as evaluate
from lightning_modules.evaluation.text import Text as Text
from lightning_modules.evaluation.text import Window as Window
from lightning_modules.evaluation.text import text_of as text_of
from lightning_modules.evaluation.text import windows as windows
