"""`vit study`: model families over amounts of pretraining data (ViT, 2010.11929, section 4.3).

From a YAML to runs (`config file settings data folder plan words`), from runs to processes (`claims runner table command`),
from what these leave to numbers (`results stats laws crossover summary`) and to pages and figures (`record page figures
controls axes`). `cells` is what all of them speak of.
"""
