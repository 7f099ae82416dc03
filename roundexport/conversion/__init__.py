"""Model in, verified packages out: the verbs that start it, and what they decide before any work.

convert.py            `convert`: tune, export, verify          vision_language.py   every part of a model, joined again
tune.py               `tune`, with who writes its text decided importing.py         integers that others have chosen
inspection.py         `inspect`: model, artifact or package    encoder_recipes.py   `bct` and `w8a8`
asked_targets.py      which targets take the model             outlook.py           the time and the disk it will take
kl_search.py          tune until a KL is kept                  kl_rounds.py         how a plan is corrected meanwhile
package_writer.py     calibration text by an 8-bit package of the model itself
package_size.py       how large a package will be
"""
