"""The page at /: plain HTML, CSS and JavaScript modules, with nothing from elsewhere.

    app.js               start, modes, requests and their errors; what is shown when
    form.js              classes, seed, number of pictures and sampling; the address bar's query
    class_picker.js      classes as chips, or as a list that is searched
    class_search.js      finding a class by its number, name or synonyms
    sampling_sliders.js  guidance, temperature, top-k and top-p
    requests.js          what the service is asked for
    service.js           the service: the model, and events read from the answer to a POST
    progress.js          the scale that is being generated, elapsed and expected time
    viewer.js            the pictures in the middle, and what they were after each scale
    mask_editor.js       a mask, painted with pointer or keyboard
    picture.js           a person's own picture, cut as the model will see it
    gallery.js           thumbnails of the history
    picture_store.js     the history in the browser's IndexedDB, within bounds
    zip.js               several pictures as one file
"""
