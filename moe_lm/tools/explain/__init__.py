"""One picture of what a model attends to and which experts take each token.

Reading order: explain, recording, picture.
"""
