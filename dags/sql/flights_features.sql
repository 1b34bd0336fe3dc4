-- What is known about a flight before it departs, and about its carrier, route and airport from earlier days.
-- Times are New York wall-clock time. The history of a day ends with the day before it: nothing looks ahead.
SELECT
    scheduled_at,
    day,
    late,
    carrier,
    origin,
    dest,
    distance,
    date_part('hour', scheduled_at) + date_part('minute', scheduled_at) / 60 AS departure_hour,
    sched_arr_time // 100 + (sched_arr_time % 100) / 60 AS arrival_hour,
    date_part('isodow', scheduled_at) AS weekday,
    departures_this_hour,
    temp, dewp, humid, wind_dir, wind_speed, wind_gust, precip, pressure, visib,
    date_part('year', scheduled_at) - plane_year AS plane_age,
    seats,
    engines,
    dest_lat,
    dest_lon,
    avg(late::INTEGER) OVER (PARTITION BY origin ORDER BY day RANGE BETWEEN INTERVAL 1 DAY PRECEDING AND INTERVAL 1 DAY PRECEDING) AS origin_late_yesterday,
    avg(late::INTEGER) OVER (PARTITION BY carrier ORDER BY day RANGE BETWEEN INTERVAL 14 DAY PRECEDING AND INTERVAL 1 DAY PRECEDING) AS carrier_late_14d,
    avg(late::INTEGER) OVER (PARTITION BY carrier, flight, dest ORDER BY day RANGE BETWEEN INTERVAL 28 DAY PRECEDING AND INTERVAL 1 DAY PRECEDING) AS flight_late_28d,
    avg(late::INTEGER) OVER (PARTITION BY dest ORDER BY day RANGE BETWEEN INTERVAL 28 DAY PRECEDING AND INTERVAL 1 DAY PRECEDING) AS dest_late_28d
FROM snapshot
