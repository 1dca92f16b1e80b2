"""Label words as anchors in a live model: cut what they read, keep nothing but them, or weigh them anew."""

from .compression import Compressed, compress
from .isolation import isolated
from .loyalty import Answers, answers, label_loyalty, word_loyalty
from .prompts import Prompt
from .reweighting import AnchorWeights

__all__ = ["AnchorWeights", "Answers", "Compressed", "Prompt", "answers", "compress", "isolated", "label_loyalty", "word_loyalty"]
