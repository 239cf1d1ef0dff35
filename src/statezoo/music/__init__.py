"""Commands on music: continue, infill, harmonise, evaluate, draw and render."""
