"""Small programs over a planned or finished run.

Before a run
pack.py     a folder of images with captions → shards
plan.py     what a run would take; plan_steps.py: the work of each step; cost_model.py: its cost
demo.py     draws pairs with known truth and filters them; scenes.py, scene_words.py: the drawing

During a run
status.py   how far a run is
alerts.py   warnings at the end of a command

After a run
verify.py   checks the files of a run; provenance.py, reread.py: against records and input
report.py   report.html: measures.py, sampled.py, plots.py, gallery.py, album.py
explain.py  why a sample was kept or dropped
sweep.py    many settings side by side: sweep_plots.py; advise.py: recommended settings
pages.py    HTML pages of report, sweep and advise; drawing.py: their Bokeh figures
selfcheck.py  how many wrong pairs a setting keeps
keep.py     filters shards in a training loop
"""
