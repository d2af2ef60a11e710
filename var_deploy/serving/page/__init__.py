"""The page at /: plain HTML, CSS and JavaScript modules, with nothing from elsewhere.

    app.js       modes, requests and their errors, the gallery, the address bar
    form.js      class, seed, count and sliders
    stage.js     the pictures in the middle, and what they were after each scale
    service.js   the service: the model, and events read from the answer to a POST
    easel.js     a mask, painted with pointer or keyboard
    picture.js   a person's own picture, cut as the model will see it
"""
