"""Small programs over a planned or finished run.

pack.py     a folder of images and captions → shards
demo.py     drawn pairs with planted truth, filtered and compared
scenes.py   draws captioned scenes
verify.py   everything that the files of a run alone can prove
"""
