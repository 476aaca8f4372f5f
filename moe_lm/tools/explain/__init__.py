"""`moe-lm explain`: what a model attends to and which experts take its tokens, as one picture.

Reading order: explain, recording, picture.
"""
