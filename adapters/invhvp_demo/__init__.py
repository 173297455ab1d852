"""The main job on real data: which labels are wrong, and which images hurt a prediction?"""
