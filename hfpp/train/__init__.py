"""The main job, `hfpp train`: real text through a real pipeline, checked against a plain model."""
